"""Operations that emitted graphs call: response parameters, structured products, noise, penalties."""
