"""What a network is exported to: files, artifacts, engines."""
