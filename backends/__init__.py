"""The backends that come with PortaLM, one folder a device."""
