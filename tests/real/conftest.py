"""The real servers, for every test in this folder."""

from tests.real.servers import influx_front, influxd, promtool, start_prometheus, victoria_metrics

__all__ = ["influx_front", "influxd", "promtool", "start_prometheus", "victoria_metrics"]
