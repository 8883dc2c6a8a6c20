"""The commands, one file a group: each reads its options, calls the part that does the work, and prints."""
