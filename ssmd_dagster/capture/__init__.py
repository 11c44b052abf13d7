"""The long-running processes of a day (connector, archiver, gateway) and their supervisor. No day rules."""
