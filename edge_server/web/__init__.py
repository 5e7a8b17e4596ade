"""The server's page: sessions, models, load, grants and refusals. It has no pictures, since none arrive."""
