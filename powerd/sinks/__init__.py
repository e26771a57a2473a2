"""Where measurements go: the embedded store, the Prometheus page, and InfluxDB by way of a spool."""
