"""Where frames come from: cameras, URLs, files, a program of one's own."""
