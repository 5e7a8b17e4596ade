"""What both pages share: who may come in, the headers that keep a page to itself, and the server that carries them."""
