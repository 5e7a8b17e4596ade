"""Many cameras in one process: one TOML, one worker, one connection to a server; one camera's failure touches no other."""
