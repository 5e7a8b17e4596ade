"""What device, server, training and evaluation share at run time; free of torch."""
