// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

use std::num::NonZeroU64;

use proptest::prelude::*;

use super::*;

fn rate(per_second: u64, burst: u64) -> Rate {
    Rate::new(per_second)
        .unwrap()
        .with_burst(NonZeroU64::new(burst).unwrap())
}

/// Passes as much as it can from `from` to `until`, in things of these sizes, woken late by `late`. What passed, in tokens,
/// and how often it was woken.
fn pass(
    bucket: &mut Bucket,
    sizes: &[u64],
    (from, until): (Duration, Duration),
    late: Duration,
) -> (u64, u64) {
    let (mut now, mut passed, mut wakes) = (from, 0_u64, 0);
    let mut sizes = sizes.iter().cycle();
    while now < until {
        match bucket.wait(now) {
            Some(wait) => {
                now += wait + late;
                wakes += 1;
            }
            None => {
                let size = *sizes.next().unwrap();
                bucket.take(size, now);
                passed += size;
            }
        }
    }
    (passed, wakes)
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn rates_are_exact_to_a_percent_at_1_10_and_100_mb() {
    for per_second in [1_000_000, 10_000_000, 100_000_000] {
        for size in [60, 1514, 65_550] {
            let mut bucket = Bucket::new(Rate::new(per_second).unwrap());
            // The burst of the start is not the rate.
            pass(
                &mut bucket,
                &[size],
                (Duration::ZERO, SECOND),
                Duration::ZERO,
            );
            let late = Duration::from_millis(5);
            let (passed, _) = pass(&mut bucket, &[size], (SECOND, 3 * SECOND), late);
            let wanted = per_second * 2;
            assert!(
                passed.abs_diff(wanted) <= wanted / 100 + size,
                "{passed} of {wanted} in pieces of {size}"
            );
        }
    }
}

#[test]
fn first_burst_passes_at_once_and_the_next_after_a_rest() {
    let mut bucket = Bucket::new(rate(1000, 500));
    for _ in 0..5 {
        assert_eq!(bucket.wait(Duration::ZERO), None);
        bucket.take(100, Duration::ZERO);
    }
    assert!(bucket.wait(Duration::ZERO).is_some());
    assert!(bucket.wait(SECOND / 20).is_none());
    // Full again after half a second, and no fuller after a day.
    for _ in 0..5 {
        assert_eq!(bucket.wait(86_400 * SECOND), None);
        bucket.take(100, 86_400 * SECOND);
    }
    assert!(bucket.wait(86_400 * SECOND).is_some());
}

#[test]
fn larger_than_the_burst_passes_and_is_paid_for() {
    let mut bucket = Bucket::new(rate(1000, 10));
    assert_eq!(bucket.wait(Duration::ZERO), None);
    bucket.take(2000, Duration::ZERO);
    let wait = bucket.wait(Duration::ZERO).unwrap();
    assert!(wait >= Duration::from_millis(1990) && wait <= Duration::from_millis(2000));
    assert_eq!(bucket.wait(wait), None);
}

#[test]
fn change_of_the_rate_counts_at_once() {
    let mut bucket = Bucket::new(rate(10, 1));
    bucket.take(1000, Duration::ZERO);
    assert!(bucket.wait(Duration::ZERO).unwrap() > 90 * SECOND);
    bucket.set(rate(1_000_000, 1000), Duration::ZERO);
    assert!(bucket.wait(Duration::ZERO).is_none_or(|wait| wait < SECOND));
    let (passed, _) = pass(&mut bucket, &[100], (SECOND, 2 * SECOND), Duration::ZERO);
    assert!(passed.abs_diff(1_000_000) < 10_000, "{passed}");
}

#[test]
fn limiter_without_a_limit_never_waits_and_both_rates_of_one_hold() {
    let limiter = Limiter::default();
    limiter.took(u64::MAX);
    assert_eq!(limiter.wait(), None);
    limiter.set(Limit {
        bytes: None,
        operations: Some(rate(1, 1)),
    });
    assert_eq!(limiter.wait(), None);
    (0..100).for_each(|_| limiter.took(u64::MAX));
    assert!(limiter.wait().unwrap() > 50 * SECOND);
    limiter.set(Limit {
        bytes: Some(rate(1, 1)),
        operations: None,
    });
    limiter.took(100);
    assert!(limiter.wait().unwrap() > 50 * SECOND);
    assert_eq!(limiter.waits(), 2);
    limiter.set(Limit::default());
    assert_eq!(limiter.wait(), None);
    assert_eq!(limiter.waits(), 2);
}

proptest! {
    /// The bound by which a limit is a limit: no more than burst, rate, and the one thing that overdrew.
    #[test]
    fn no_more_passes_than_burst_and_rate(
        per_second in 1_u64..10_000_000_000,
        burst in 1_u64..1_000_000_000,
        sizes in prop::collection::vec(1_u64..100_000, 1..20),
        late_us in 0_u64..50_000,
    ) {
        let mut bucket = Bucket::new(rate(per_second, burst));
        let largest = *sizes.iter().max().unwrap();
        let (mut now, mut passed) = (Duration::ZERO, 0_u64);
        let mut sizes = sizes.iter().cycle();
        for _ in 0..2000 {
            match bucket.wait(now) {
                Some(wait) => {
                    now += wait + Duration::from_micros(late_us);
                    prop_assert_eq!(bucket.wait(now), None, "a wait is long enough");
                }
                None => {
                    let size = *sizes.next().unwrap();
                    bucket.take(size, now);
                    passed += size;
                }
            }
            let earned = u128::from(per_second) * now.as_nanos() / 1_000_000_000;
            prop_assert!(u128::from(passed) <= earned + u128::from(burst) + u128::from(largest) + 1);
        }
    }

    /// No more than the rate is lost to waiting, and nobody is woken more often than every two milliseconds.
    #[test]
    fn no_less_passes_than_the_rate(
        per_second in 1_000_u64..10_000_000_000,
        size in 1_u64..70_000,
        late_us in 0_u64..40_000,
    ) {
        // A rate of which a tenth of a second is less than the piece pays for each by itself.
        let mut bucket = Bucket::new(Rate::new(per_second).unwrap());
        let size = size.clamp(per_second / 10_000, per_second);
        let late = Duration::from_micros(late_us);
        pass(&mut bucket, &[size], (Duration::ZERO, SECOND), late);
        let (passed, wakes) = pass(&mut bucket, &[size], (SECOND, 11 * SECOND), late);
        let wanted = per_second * 10;
        prop_assert!(passed + 2 * size >= wanted - wanted / 50, "{} of {}", passed, wanted);
        prop_assert!(wakes <= 10 * 500 + 1, "{} wakes", wakes);
    }

    #[test]
    fn no_numbers_make_it_panic(
        per_second in 1_u64..,
        burst in 1_u64..,
        costs in prop::collection::vec(any::<u64>(), 1..20),
        times in prop::collection::vec(any::<u64>(), 1..20),
    ) {
        let mut bucket = Bucket::new(rate(per_second, burst));
        for (cost, time) in costs.iter().zip(times) {
            let now = Duration::from_nanos(time);
            let _ = bucket.wait(now);
            bucket.take(*cost, now);
            bucket.set(rate(burst, per_second), now);
        }
    }
}
