const OllamaClient = require('./ollama-client');

class OllamaConnectionPool {
  constructor(config, poolSize = 5) {
    this.config = config;
    this.poolSize = poolSize;
    this.clients = [];
    this.availableClients = [];
  }

  async initialize() {
    for (let i = 0; i < this.poolSize; i++) {
      const client = new OllamaClient(this.config);
      await client.connect();
      this.clients.push(client);
      this.availableClients.push(client);
    }
    console.log(`Connection pool initialized with ${this.poolSize} clients`);
  }

  async getClient() {
    if (this.availableClients.length === 0) {
      return new Promise((resolve) => {
        const checkInterval = setInterval(() => {
          if (this.availableClients.length > 0) {
            clearInterval(checkInterval);
            resolve(this.availableClients.pop());
          }
        }, 100);
      });
    }

    return this.availableClients.pop();
  }

  releaseClient(client) {
    this.availableClients.push(client);
  }

  async generate(prompt, model, options) {
    const client = await this.getClient();
    try {
      const result = await client.generate(prompt, model, options);
      return result;
    } finally {
      this.releaseClient(client);
    }
  }

  close() {
    this.clients.forEach(client => client.close());
    this.clients = [];
    this.availableClients = [];
  }
}

module.exports = OllamaConnectionPool;
