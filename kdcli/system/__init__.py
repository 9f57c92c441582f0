"""What the machine offers: devices, processes, files, signals."""
