"""Starts the MQTT broker and writes its configuration and access rules."""
