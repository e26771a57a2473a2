"""The real servers of tests.real, for the tests of the dashboards."""

from tests.real.servers import promtool, start_prometheus

__all__ = ["promtool", "start_prometheus"]
