"""The machine: devices, processes, terminal, package versions."""
