"""What ELF files say: where code is in them, and what it is called."""
