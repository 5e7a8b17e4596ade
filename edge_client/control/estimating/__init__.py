"""What acknowledgements tell: the link, lateness, payload sizes, and the window that follows."""
