"""Runtime of the emitted graphs: response parameters, structured products, noise, penalties. Knows no pass."""
