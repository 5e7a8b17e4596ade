"""What carries frames to the server and answers back: the contract in ``base``, gRPC in ``grpc`` and ``rpc``."""
