"""What depends on the processor: nothing above this folder names a register."""
