"""What several tests use: made-up data sets, small networks, other implementations. Nothing here is a test."""
