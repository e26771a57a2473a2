"""DynamoLLM beside its baselines, the published figures and a well-chosen static fleet."""
