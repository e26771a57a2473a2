"""Where measurements go: the embedded store and the Prometheus page."""
