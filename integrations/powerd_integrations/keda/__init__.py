"""KEDA's external scaler: a gRPC service that tells Kubernetes how many replicas the plan wants."""
