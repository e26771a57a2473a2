"""DynamoLLM on Ray Serve: a deployment per pool and tensor parallelism, a router before them, a policy that follows the plan."""
