"""Device mesh, sharding rules, processes of a run, and the cost of compiled programs."""
