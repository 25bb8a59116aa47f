import json
import asyncio
import base64
import uuid
from typing import Dict, List, Any, Optional, Callable, Union
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import load_pem_private_key
import websockets

class OllamaClient:
    def __init__(self, config: Dict[str, Any]):
        """
        Initialize the Ollama WebSocket client.

        Args:
            config: A dictionary containing the client configuration.
                - server_url: WebSocket server URL (default: ws://localhost:3000)
                - client_id: Client ID for authentication
                - private_key_path: Path to the private key file
                - private_key: PEM-encoded private key (alternative to private_key_path)
                - signature_algorithm: Algorithm for signing challenges (default: SHA256)
        """
        self.config = {
            'server_url': 'ws://localhost:3000',
            'client_id': None,
            'private_key_path': None,
            'private_key': None,
            'signature_algorithm': 'SHA256',
            **config
        }

        self.ws = None
        self.connected = False
        self.authenticated = False
        self.private_key = None
        self.message_callbacks = {}
        self.active_requests = {}

    async def connect(self) -> None:
        """
        Connect to the WebSocket server and authenticate.

        Raises:
            ValueError: If required configuration is missing
            ConnectionError: If connection or authentication fails
        """
        if not self.config['client_id']:
            raise ValueError("Client ID is required")

        # Load private key
        if not self.private_key:
            if self.config['private_key']:
                self._load_private_key_from_string(self.config['private_key'])
            elif self.config['private_key_path']:
                self._load_private_key_from_file(self.config['private_key_path'])
            else:
                raise ValueError("Either private_key or private_key_path must be provided")

        try:
            self.ws = await websockets.connect(self.config['server_url'])
            self.connected = True

            # Wait for challenge and authenticate
            challenge_msg = await self.ws.recv()
            challenge_data = json.loads(challenge_msg)

            if challenge_data['type'] != 'challenge':
                raise ConnectionError(f"Expected challenge message, got {challenge_data['type']}")

            # Handle challenge
            challenge = challenge_data['challenge']
            signature = self._sign_challenge(challenge)

            # Send authentication response
            auth_response = {
                'type': 'authenticate',
                'clientId': self.config['client_id'],
                'signature': signature
            }
            await self.ws.send(json.dumps(auth_response))

            # Wait for authentication result
            auth_result_msg = await self.ws.recv()
            auth_result = json.loads(auth_result_msg)

            if auth_result['type'] != 'auth_result':
                raise ConnectionError(f"Expected auth_result message, got {auth_result['type']}")

            if not auth_result['success']:
                raise ConnectionError(f"Authentication failed: {auth_result.get('error', 'Unknown error')}")

            self.authenticated = True

            # Start message handler
            asyncio.create_task(self._message_handler())

            return True
        except (websockets.exceptions.WebSocketException, ConnectionError) as e:
            self.connected = False
            self.authenticated = False
            raise ConnectionError(f"Connection failed: {str(e)}")

    def _load_private_key_from_file(self, filepath: str) -> None:
        """Load a private key from a file."""
        with open(filepath, 'rb') as f:
            private_key_data = f.read()
            self._load_private_key_from_string(private_key_data.decode('utf-8'))

    def _load_private_key_from_string(self, private_key_str: str) -> None:
        """Load a private key from a string."""
        try:
            self.private_key = load_pem_private_key(
                private_key_str.encode('utf-8'),
                password=None
            )
        except Exception as e:
            raise ValueError(f"Failed to load private key: {str(e)}")

    def _sign_challenge(self, challenge: str) -> str:
        """Sign a challenge string with the private key."""
        if self.config['signature_algorithm'] == 'SHA256':
            hash_algorithm = hashes.SHA256()
        elif self.config['signature_algorithm'] == 'SHA384':
            hash_algorithm = hashes.SHA384()
        elif self.config['signature_algorithm'] == 'SHA512':
            hash_algorithm = hashes.SHA512()
        else:
            hash_algorithm = hashes.SHA256()

        signature = self.private_key.sign(
            challenge.encode('utf-8'),
            padding.PKCS1v15(),
            hash_algorithm
        )

        return base64.b64encode(signature).decode('utf-8')

    async def _message_handler(self) -> None:
        """Handle incoming messages from the WebSocket."""
        try:
            while self.connected:
                try:
                    message = await self.ws.recv()
                    data = json.loads(message)
                    await self._process_message(data)
                except json.JSONDecodeError:
                    print(f"Received invalid JSON: {message}")
                except websockets.exceptions.ConnectionClosed:
                    self.connected = False
                    self.authenticated = False
                    break
        except Exception as e:
            print(f"Message handler error: {str(e)}")
            self.connected = False
            self.authenticated = False

    async def _process_message(self, message: Dict[str, Any]) -> None:
        """Process a message from the server."""
        message_type = message.get('type')

        # Call callbacks if registered
        if message_type in self.message_callbacks:
            for callback in self.message_callbacks[message_type]:
                asyncio.create_task(callback(message))

        # Handle specific message types
        if message_type == 'stream_token':
            request_id = message.get('id')
            if request_id in self.active_requests:
                self.active_requests[request_id]['text'] += message.get('token', '')

        elif message_type == 'stream_end':
            request_id = message.get('id')
            if request_id in self.active_requests:
                request = self.active_requests[request_id]
                if 'future' in request:
                    request['future'].set_result({
                        'text': request['text'],
                        'total_tokens': message.get('totalTokens'),
                        'elapsed_time': message.get('elapsedTime')
                    })
                del self.active_requests[request_id]

        elif message_type == 'error':
            request_id = message.get('id')
            if request_id in self.active_requests:
                request = self.active_requests[request_id]
                if 'future' in request:
                    request['future'].set_exception(
                        Exception(f"{message.get('error')} (code: {message.get('code')})")
                    )
                del self.active_requests[request_id]

        elif message_type == 'models_result':
            if 'models' in self.active_requests:
                request = self.active_requests['models']
                if 'future' in request:
                    request['future'].set_result(message.get('models', []))
                del self.active_requests['models']

    def on(self, message_type: str, callback: Callable) -> None:
        """Register a callback for a specific message type."""
        if message_type not in self.message_callbacks:
            self.message_callbacks[message_type] = []
        self.message_callbacks[message_type].append(callback)

    def off(self, message_type: str, callback: Optional[Callable] = None) -> None:
        """Remove a callback for a specific message type."""
        if message_type in self.message_callbacks:
            if callback:
                self.message_callbacks[message_type] = [
                    cb for cb in self.message_callbacks[message_type] if cb != callback
                ]
            else:
                self.message_callbacks[message_type] = []

    async def generate(self, prompt: str, model: str = 'llama2', options: Dict = None) -> Dict[str, Any]:
        """
        Generate text using the language model.

        Args:
            prompt: The prompt to generate from
            model: The model to use (default: llama2)
            options: Generation options (temperature, max_tokens, etc.)

        Returns:
            Dictionary containing generated text and metadata

        Raises:
            ConnectionError: If not connected or authenticated
            Exception: If generation fails
        """
        if not self.connected or not self.authenticated:
            raise ConnectionError("Not connected or authenticated")

        if options is None:
            options = {}

        # Create a unique request ID
        request_id = str(uuid.uuid4())

        # Create a future to wait for the result
        future = asyncio.get_event_loop().create_future()

        # Store request data
        self.active_requests[request_id] = {
            'future': future,
            'text': ''
        }

        # Send generation request
        await self.ws.send(json.dumps({
            'type': 'generate',
            'id': request_id,
            'model': model,
            'prompt': prompt,
            'options': options
        }))

        # Wait for the result
        return await future

    async def stop(self, request_id: str) -> None:
        """
        Stop an ongoing generation.

        Args:
            request_id: The ID of the request to stop

        Raises:
            ConnectionError: If not connected or authenticated
        """
        if not self.connected or not self.authenticated:
            raise ConnectionError("Not connected or authenticated")

        if request_id not in self.active_requests:
            return

        await self.ws.send(json.dumps({
            'type': 'stop',
            'id': request_id
        }))

    async def get_models(self) -> List[str]:
        """
        Get a list of available models.

        Returns:
            List of model names

        Raises:
            ConnectionError: If not connected or authenticated
        """
        if not self.connected or not self.authenticated:
            raise ConnectionError("Not connected or authenticated")

        # Create a future to wait for the result
        future = asyncio.get_event_loop().create_future()

        # Store request data
        self.active_requests['models'] = {
            'future': future
        }

        # Send models request
        await self.ws.send(json.dumps({
            'type': 'models'
        }))

        # Wait for the result
        return await future

    async def ping(self) -> None:
        """
        Send a ping to keep the connection alive.

        Raises:
            ConnectionError: If not connected
        """
        if not self.connected:
            raise ConnectionError("Not connected")

        await self.ws.send(json.dumps({
            'type': 'ping'
        }))

    async def close(self) -> None:
        """Close the WebSocket connection."""
        if self.ws:
            await self.ws.close()
            self.connected = False
            self.authenticated = False


import threading
import asyncio
from functools import wraps

class SyncOllamaClient:
    """Synchronous wrapper for the async OllamaClient."""

    def __init__(self, config):
        self.async_client = OllamaClient(config)
        self.loop = asyncio.new_event_loop()
        self.thread = None

    def _start_background_loop(self):
        """Start the event loop in a background thread."""
        if self.thread is not None:
            return

        def run_loop_in_thread():
            asyncio.set_event_loop(self.loop)
            self.loop.run_forever()

        self.thread = threading.Thread(target=run_loop_in_thread, daemon=True)
        self.thread.start()

    def _run_coroutine(self, coro):
        """Run a coroutine in the event loop."""
        if self.thread is None:
            self._start_background_loop()

        future = asyncio.run_coroutine_threadsafe(coro, self.loop)
        return future.result()

    def connect(self):
        """Connect to the WebSocket server synchronously."""
        return self._run_coroutine(self.async_client.connect())

    def generate(self, prompt, model='llama2', options=None):
        """Generate text synchronously."""
        return self._run_coroutine(self.async_client.generate(prompt, model, options))

    def stop(self, request_id):
        """Stop a generation synchronously."""
        return self._run_coroutine(self.async_client.stop(request_id))

    def get_models(self):
        """Get available models synchronously."""
        return self._run_coroutine(self.async_client.get_models())

    def close(self):
        """Close the connection synchronously."""
        if self.thread is not None:
            result = self._run_coroutine(self.async_client.close())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(timeout=5)
            self.thread = None
            return result


import asyncio
from typing import Dict, List, Any, Optional

class OllamaConnectionPool:
    def __init__(self, config: Dict[str, Any], pool_size: int = 5):
        """Initialize a connection pool of Ollama clients."""
        self.config = config
        self.pool_size = pool_size
        self.clients = []
        self.available_clients = []
        self.lock = asyncio.Lock()

    async def initialize(self) -> None:
        """Initialize the connection pool."""
        for _ in range(self.pool_size):
            client = OllamaClient(self.config)
            await client.connect()
            self.clients.append(client)
            self.available_clients.append(client)

        print(f"Connection pool initialized with {self.pool_size} clients")

    async def get_client(self) -> OllamaClient:
        """Get an available client from the pool."""
        async with self.lock:
            while not self.available_clients:
                await asyncio.sleep(0.1)

            return self.available_clients.pop()

    async def release_client(self, client: OllamaClient) -> None:
        """Return a client to the pool."""
        async with self.lock:
            self.available_clients.append(client)

    async def generate(self, prompt: str, model: str = 'llama2', options: Dict = None) -> Dict[str, Any]:
        """Generate text using a client from the pool."""
        client = await self.get_client()
        try:
            result = await client.generate(prompt, model, options)
            return result
        finally:
            await self.release_client(client)

    async def get_models(self) -> List[str]:
        """Get available models using a client from the pool."""
        client = await self.get_client()
        try:
            models = await client.get_models()
            return models
        finally:
            await self.release_client(client)

    async def close(self) -> None:
        """Close all clients in the pool."""
        for client in self.clients:
            await client.close()

        self.clients = []
        self.available_clients = []
