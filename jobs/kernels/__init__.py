"""How linear layers and attention of a given format run on a given device."""
