"""Where bytes live: on the device, or in pinned host memory that a device addresses."""
