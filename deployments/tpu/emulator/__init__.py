"""An emulator of the Cloud TPU API on the loopback interface: hosts of a slice are processes of this machine."""
