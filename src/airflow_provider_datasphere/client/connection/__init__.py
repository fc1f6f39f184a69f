"""The connection: settings, credentials and tokens, endpoints, channels."""
