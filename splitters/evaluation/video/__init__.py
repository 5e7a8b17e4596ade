"""A bundle on a camera's clips: beside video codecs, and fitted to them."""
