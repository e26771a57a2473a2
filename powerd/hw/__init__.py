"""The privileged side: the only code that opens NVML and the only code that sets anything."""
