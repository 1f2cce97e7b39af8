//! What several runs say together: medians, extremes, and ratios taken pair by pair. It knows nothing of what was run.

/// A median with the least and the most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// Of at least one value.
    pub(crate) fn of(values: &[f64]) -> Option<Spread> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] };
        Some(Spread { median, min, max })
    }
}

/// The ratios of runs that were made in the same round: what the machine did meanwhile touches both.
pub(crate) fn paired_ratios(values: &[f64], yardstick: &[f64]) -> Option<Spread> {
    let ratios: Vec<f64> = values.iter().zip(yardstick).map(|(value, yardstick)| value / yardstick).collect();
    Spread::of(&ratios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(Spread::of(&[4.0, 1.0, 3.0, 2.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
    }

    #[test]
    fn a_median_of_an_odd_number_is_the_middle_one() {
        assert_eq!(Spread::of(&[9.0, 1.0, 3.0]), Some(Spread { median: 3.0, min: 1.0, max: 9.0 }));
    }

    #[test]
    fn nothing_has_no_median() {
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        // The ratio of the medians would be 1.
        let ratios = paired_ratios(&[10.0, 20.0, 30.0], &[20.0, 10.0, 30.0]).unwrap();
        assert_eq!(ratios, Spread { median: 1.0, min: 0.5, max: 2.0 });
        let ratios = paired_ratios(&[1.0, 2.0, 9.0], &[2.0, 4.0, 3.0]).unwrap();
        assert_eq!(ratios.median, 0.5);
    }
}
