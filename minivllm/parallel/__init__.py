"""Several devices as one: collective operations and where runners live."""
