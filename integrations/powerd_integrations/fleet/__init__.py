"""A fleet of inference engines in production: what is observed becomes a plan, what is planned becomes replicas."""
