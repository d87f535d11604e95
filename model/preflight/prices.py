"""What a TPU slice costs: a dated table of list prices, and hours to dollars.

The figures are Google's list prices in US dollars per chip and hour, for one region of each generation. They are what was
published when the table was read (`AS_OF`), before committed-use and negotiated discounts, and exclude the disks and the
network. Spot prices change by region and up to once a month: take them for an order of size.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from typing import Literal

from model.slices import Generation, Slice

PricingModel = Literal["on_demand", "spot"]

AS_OF = datetime.date(2026, 11, 24)
PRICING_PAGE = "https://cloud.google.com/tpu/pricing"
# Google's billing SKUs, put in a table by SkyPilot several times a day; commit 8427bbff of that repository.
SOURCE = "github.com/skypilot-org/skypilot-catalog, catalogs/v8/gcp/vms.csv"


@dataclass(frozen=True)
class Price:
    """List prices of one chip for one hour, in US dollars."""

    on_demand: float
    spot: float
    region: str


PRICES: dict[Generation, Price] = {
    "v4": Price(on_demand=3.22, spot=0.9215, region="us-central2"),
    "v5e": Price(on_demand=1.20, spot=0.2449, region="us-central1"),
    "v5p": Price(on_demand=4.20, spot=0.9286, region="us-central1"),
    "v6e": Price(on_demand=2.70, spot=0.5729, region="us-central1"),
}


@dataclass(frozen=True)
class Cost:
    """Dollars of a job, with what they were worked out from."""

    dollars: float
    chip_hours: float
    dollars_per_chip_hour: float
    pricing: PricingModel
    region: str
    as_of: datetime.date
    source: str

    def __str__(self) -> str:
        """One line for people, with the date of the price."""
        return (
            f"${self.dollars:,.0f}: {self.chip_hours:,.0f} chip-hours at ${self.dollars_per_chip_hour:.2f}, "
            f"{self.pricing.replace('_', '-')} list price in {self.region} as of {self.as_of}"
        )


def cost(tpu_slice: Slice, num_slices: int, hours: float, pricing: PricingModel = "on_demand") -> Cost:
    """What `num_slices` of `tpu_slice` cost for `hours` by the table of `AS_OF`; a slice is charged while it is up, busy or not.

    Raises:
        ValueError: fewer than one slice, or hours that are no number from zero up.
    """
    if num_slices < 1:
        raise ValueError(f"num_slices={num_slices} must be at least 1")
    if not 0 <= hours < math.inf:
        raise ValueError(f"hours={hours} must be a finite number of hours, 0 or more")
    price = PRICES[tpu_slice.generation]
    rate = price.on_demand if pricing == "on_demand" else price.spot
    chip_hours = tpu_slice.num_chips * num_slices * hours
    return Cost(chip_hours * rate, chip_hours, rate, pricing, price.region, AS_OF, SOURCE)
