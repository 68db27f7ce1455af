"""Ways of choosing pixels, one file each, and what they share."""
