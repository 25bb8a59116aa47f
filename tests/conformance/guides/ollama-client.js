const WebSocket = require('ws');
const crypto = require('crypto');
const fs = require('fs');
const EventEmitter = require('events');

class OllamaClient extends EventEmitter {
  constructor(config) {
    super();
    this.config = {
      serverUrl: 'ws://localhost:3000',
      clientId: null,
      privateKeyPath: null,
      privateKey: null,
      signatureAlgorithm: 'SHA256',
      reconnect: true,
      maxReconnectAttempts: 5,
      reconnectDelay: 1000,
      ...config
    };

    this.ws = null;
    this.connected = false;
    this.authenticated = false;
    this.reconnectAttempts = 0;
    this.activeRequests = new Map();
  }

  /**
   * Connect to the server and authenticate
   * @returns {Promise<void>} Resolves when authenticated
   */
  connect() {
    return new Promise((resolve, reject) => {
      try {
        // Load private key if path is provided but key isn't
        if (this.config.privateKeyPath && !this.config.privateKey) {
          this.config.privateKey = fs.readFileSync(this.config.privateKeyPath, 'utf8');
        }

        if (!this.config.privateKey) {
          throw new Error('Private key is required');
        }

        if (!this.config.clientId) {
          throw new Error('Client ID is required');
        }

        this.ws = new WebSocket(this.config.serverUrl);

        this.ws.on('open', () => {
          this.connected = true;
          this.emit('connect');
        });

        this.ws.on('message', (data) => {
          try {
            const message = JSON.parse(data);
            this.handleMessage(message, resolve, reject);
          } catch (error) {
            reject(new Error(`Failed to parse message: ${error.message}`));
          }
        });

        this.ws.on('error', (error) => {
          this.emit('error', error);
          reject(error);
        });

        this.ws.on('close', (code, reason) => {
          this.connected = false;
          this.authenticated = false;
          this.emit('disconnect', { code, reason });

          // Handle reconnection
          if (this.config.reconnect && this.reconnectAttempts < this.config.maxReconnectAttempts) {
            this.reconnectAttempts++;
            this.emit('reconnecting', { attempt: this.reconnectAttempts });

            setTimeout(() => {
              this.connect()
                .then(() => {
                  this.reconnectAttempts = 0;
                  this.emit('reconnect');
                })
                .catch((error) => {
                  this.emit('reconnect_error', error);
                });
            }, this.config.reconnectDelay * this.reconnectAttempts);
          }
        });
      } catch (error) {
        reject(error);
      }
    });
  }

  /**
   * Handle incoming WebSocket messages
   * @private
   */
  handleMessage(message, resolveAuth, rejectAuth) {
    this.emit('message', message);

    switch (message.type) {
      case 'challenge':
        this.handleChallenge(message.challenge)
          .catch((error) => {
            rejectAuth(error);
          });
        break;

      case 'auth_result':
        if (message.success) {
          this.authenticated = true;
          this.emit('authenticated');
          resolveAuth();
        } else {
          const error = new Error(`Authentication failed: ${message.error}`);
          this.emit('auth_error', error);
          rejectAuth(error);
        }
        break;

      case 'stream_start':
        this.emit('generation_start', {
          id: message.id,
          model: message.model
        });
        break;

      case 'stream_token':
        const request = this.activeRequests.get(message.id);
        if (request) {
          request.result += message.token;
          this.emit('token', {
            id: message.id,
            token: message.token
          });
        }
        break;

      case 'stream_end':
        const completedRequest = this.activeRequests.get(message.id);
        if (completedRequest) {
          completedRequest.resolve({
            text: completedRequest.result,
            totalTokens: message.totalTokens,
            elapsedTime: message.elapsedTime
          });

          this.activeRequests.delete(message.id);

          this.emit('generation_complete', {
            id: message.id,
            totalTokens: message.totalTokens,
            elapsedTime: message.elapsedTime
          });
        }
        break;

      case 'error':
        const failedRequest = this.activeRequests.get(message.id);
        if (failedRequest) {
          failedRequest.reject(new Error(`${message.error} (${message.code})`));
          this.activeRequests.delete(message.id);
        }

        this.emit('error', {
          message: message.error,
          code: message.code,
          id: message.id
        });
        break;

      case 'models_result':
        const modelsRequest = this.activeRequests.get('models');
        if (modelsRequest) {
          modelsRequest.resolve(message.models);
          this.activeRequests.delete('models');
        }
        this.emit('models', message.models);
        break;

      case 'pong':
        this.emit('pong', { timestamp: message.timestamp });
        break;
    }
  }

  /**
   * Handle authentication challenge
   * @private
   */
  handleChallenge(challenge) {
    try {
      // Sign the challenge
      const sign = crypto.createSign(this.config.signatureAlgorithm);
      sign.update(challenge);
      const signature = sign.sign(this.config.privateKey, 'base64');

      // Send authentication response
      this.ws.send(JSON.stringify({
        type: 'authenticate',
        clientId: this.config.clientId,
        signature
      }));

      return Promise.resolve();
    } catch (error) {
      return Promise.reject(new Error(`Failed to sign challenge: ${error.message}`));
    }
  }

  /**
   * Generate text using the language model
   * @param {string} prompt - The prompt to generate from
   * @param {string} model - The model to use
   * @param {Object} options - Generation options
   * @returns {Promise<Object>} - The generated text and metadata
   */
  generate(prompt, model = 'llama2', options = {}) {
    if (!this.authenticated) {
      return Promise.reject(new Error('Not authenticated'));
    }

    return new Promise((resolve, reject) => {
      const requestId = Math.random().toString(36).substring(2, 15);

      this.activeRequests.set(requestId, {
        resolve,
        reject,
        result: ''
      });

      this.ws.send(JSON.stringify({
        type: 'generate',
        id: requestId,
        model,
        prompt,
        options
      }));
    });
  }

  /**
   * Stop an ongoing generation
   * @param {string} requestId - The ID of the request to stop
   */
  stop(requestId) {
    if (!this.authenticated || !this.activeRequests.has(requestId)) {
      return Promise.reject(new Error('No active generation with that ID'));
    }

    this.ws.send(JSON.stringify({
      type: 'stop',
      id: requestId
    }));

    return Promise.resolve();
  }

  /**
   * Get a list of available models
   * @returns {Promise<string[]>} - Array of model names
   */
  getModels() {
    if (!this.authenticated) {
      return Promise.reject(new Error('Not authenticated'));
    }

    return new Promise((resolve, reject) => {
      this.activeRequests.set('models', { resolve, reject });

      this.ws.send(JSON.stringify({
        type: 'models'
      }));
    });
  }

  /**
   * Send a ping to keep the connection alive
   */
  ping() {
    if (!this.connected) {
      return Promise.reject(new Error('Not connected'));
    }

    this.ws.send(JSON.stringify({
      type: 'ping'
    }));

    return Promise.resolve();
  }

  /**
   * Close the WebSocket connection
   */
  close() {
    if (this.ws) {
      this.ws.close();
      this.ws = null;
      this.connected = false;
      this.authenticated = false;
    }
  }
}

module.exports = OllamaClient;
