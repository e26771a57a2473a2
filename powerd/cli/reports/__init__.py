"""A report: collected from nodes or from a metrics server, put together, and written as JSON, HTML or PDF.

House rules: what was not measured is None and named as a gap; a saving is the ledger's verdict, never an assumption; the JSON is
the report, pages only show it.
"""
