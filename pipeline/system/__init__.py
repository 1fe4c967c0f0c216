"""The process: settings, command line, devices, memory, disk."""
