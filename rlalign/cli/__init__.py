"""Commands. Thin, and the only room besides recipes that may import every other one."""
