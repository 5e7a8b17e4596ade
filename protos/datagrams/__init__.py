"""Messages as datagrams: cut into pieces with parity, paced, and put together again from whatever arrives. Both ends use it."""
