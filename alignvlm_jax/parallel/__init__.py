"""Device mesh, sharding rules, the processes of a run, and the cost of compiled programs."""
