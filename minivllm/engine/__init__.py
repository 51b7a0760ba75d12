"""The loop that joins scheduler and runner, and the process boundary around it."""
