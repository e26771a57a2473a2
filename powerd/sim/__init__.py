"""A simulated NVIDIA driver: real NVML calls on GPUs that do not exist; everything computed on it says "simulated"."""
