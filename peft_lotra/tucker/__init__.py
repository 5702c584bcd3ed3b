"""Tucker algebra, spectra and ranks of plain tensors."""
