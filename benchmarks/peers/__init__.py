"""What flashinf is compared with, one file each, every one as strong as it can be made."""
