"""DynamoLLM (HPCA'25): replicas, tensor parallelism and clocks per request class under latency targets."""
