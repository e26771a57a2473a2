"""Grafana dashboards as tables of panels: ``python -m dashboards.grafana`` writes the JSON files beside this."""
