"""Measurements that take minutes: each prints one line, and writes what it saw as JSON when asked."""
