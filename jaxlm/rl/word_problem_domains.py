"""What word problems are made of: programs of calls, and the domains that dress them in words.

In a question {a}, {b}, {c}, {d}, {e} are the numbers of its program, {n} and {m} two people, {x} and {y} two things.
Programs in `UNSEEN_PROGRAMS` combine known tools in ways that no training domain does.
"""

from typing import Any, Literal, NamedTuple

Kind = Literal["small", "number", "large", "square", "exponent"]
# What a result must be for the problem to make sense: a positive integer; a number that is none, of three decimals at
# most, so that it can be copied; such a one whose rounding nobody disputes; an integer other than 0.
Need = Literal["whole", "fraction", "no_half", "nonzero"]


class Step(NamedTuple):
    """One call. In arguments a letter is a number of the question, "#0" the result of the first step."""

    tool: str
    arguments: dict[str, Any]
    need: Need = "whole"  # a positive integer


class Program(NamedTuple):
    """How a teacher solves a problem: turns of (what it says, its calls). The last result is the answer."""

    numbers: dict[str, Kind]
    turns: tuple[tuple[str, tuple[Step, ...]], ...]

    def steps(self) -> tuple[Step, ...]:
        return tuple(step for _, steps in self.turns for step in steps)


class Domain(NamedTuple):
    """Words of one field of life: things, remarks whose number {z} does not matter, and questions by program."""

    things: tuple[str, ...]
    remarks: tuple[str, ...]
    questions: dict[str, tuple[str, ...]]


def _two(tool: str, a: Any, b: Any, need: Need = "whole") -> Step:
    return Step(tool, {"a": a, "b": b}, need)


def _sum(*numbers: str) -> Step:
    return Step("sum_numbers", {"numbers": list(numbers)})


PROGRAMS: dict[str, Program] = {
    "add": Program({"a": "number", "b": "number"}, (("Add the two numbers.", (_two("add", "a", "b"),)),)),
    "left": Program({"a": "number", "b": "number"}, (("Take away what is gone.", (_two("subtract", "a", "b"),)),)),
    "times": Program({"a": "small", "b": "number"}, (("Multiply the two numbers.", (_two("multiply", "a", "b"),)),)),
    "share": Program({"a": "large", "b": "small"}, (("Divide into equal parts.", (_two("divide", "a", "b"),)),)),
    "total": Program({"a": "number", "b": "number", "c": "number"},
                     (("Add up the three numbers.", (_sum("a", "b", "c"),)),)),
    "rest": Program({"a": "large", "b": "small"},
                    (("What is left over is the remainder.", (_two("modulo", "a", "b"),)),)),
    "gap": Program({"a": "number", "b": "number"},
                   (("Subtract one from the other.", (_two("subtract", "a", "b", "nonzero"),)),
                    ("The sign does not matter.", (Step("abs_value", {"x": "#0"}),)))),
    "full": Program({"a": "large", "b": "small"},
                    (("Divide to get the number of groups.", (_two("divide", "a", "b", "fraction"),)),
                     ("Only full groups count, so round down.", (Step("floor", {"x": "#0"}),)))),
    "needed": Program({"a": "large", "b": "small"},
                      (("Divide to get the number of groups.", (_two("divide", "a", "b", "fraction"),)),
                       ("Nothing stays behind, so round up.", (Step("ceil", {"x": "#0"}),)))),
    "average": Program({"a": "number", "b": "number", "c": "number"},
                       (("First add up the three numbers.", (_sum("a", "b", "c"),)),
                        ("Then divide by 3.", (_two("divide", "#0", 3),)))),
    "about": Program({"a": "number", "b": "number", "c": "number", "d": "number"},
                     (("First add up the four numbers.", (_sum("a", "b", "c", "d"),)),
                      ("Then divide by 4.", (_two("divide", "#0", 4, "no_half"),)),
                      ("Round to a whole number.", (Step("round_number", {"x": "#1"}),)))),
    "double": Program({"a": "number", "b": "exponent"},
                      (("Doubling {b} times is 2 to the power {b}.", (Step("power", {"base": 2, "exponent": "b"}),)),
                       ("Multiply with the start.", (_two("multiply", "a", "#0"),)))),
    "side": Program({"a": "square"}, (("The side is the square root.", (Step("sqrt", {"x": "a"}),)),)),
    "fence": Program({"a": "square"}, (("The side is the square root.", (Step("sqrt", {"x": "a"}),)),
                                       ("There are 4 equal sides.", (_two("multiply", 4, "#0"),)))),
    "square_left": Program({"a": "small", "b": "number"},
                           (("The square has {a} to the power 2.", (Step("power", {"base": "a", "exponent": 2}),)),
                            ("Take away what is gone.", (_two("subtract", "#0", "b"),)))),
    "change": Program({"a": "small", "b": "number", "c": "large"},
                      (("First find the whole price.", (_two("multiply", "a", "b"),)),
                       ("Subtract it from the money.", (_two("subtract", "c", "#0"),)))),
    "grow_share": Program({"a": "number", "b": "number", "c": "small"},
                          (("First add the two numbers.", (_two("add", "a", "b"),)),
                           ("Then divide into equal parts.", (_two("divide", "#0", "c"),)))),
    "left_share": Program({"a": "large", "b": "number", "c": "small"},
                          (("Take away what is gone.", (_two("subtract", "a", "b"),)),
                           ("Then divide into equal parts.", (_two("divide", "#0", "c"),)))),
    "clock": Program({"a": "small", "b": "number"},
                     (("First add the hours.", (_two("add", "a", "b"),)),
                      ("The clock starts again after 12.", (_two("modulo", "#0", 12),)))),
    "total_rest": Program({"a": "number", "b": "number", "c": "number", "d": "small"},
                          (("First add up the three numbers.", (_sum("a", "b", "c"),)),
                           ("What is left over is the remainder.", (_two("modulo", "#0", "d"),)))),
    "kinds": Program({"a": "small", "b": "number", "c": "small", "d": "number"},
                     (("Multiply each number with its size.", (_two("multiply", "a", "b"), _two("multiply", "c", "d"))),
                      ("Then add both.", (_two("add", "#0", "#1"),)))),
    "kinds_change": Program({"a": "small", "b": "small", "c": "small", "d": "small", "e": "large"},
                            (("Multiply each number with its size.",
                              (_two("multiply", "a", "b"), _two("multiply", "c", "d"))),
                             ("Then add both.", (_two("add", "#0", "#1"),)),
                             ("Take away what is gone.", (_two("subtract", "e", "#2"),)))),
}

UNSEEN_PROGRAMS: dict[str, Program] = {
    "diagonal": Program({"a": "number", "b": "number"},
                        (("First square both sides.", (Step("power", {"base": "a", "exponent": 2}),
                                                       Step("power", {"base": "b", "exponent": 2}))),
                         ("Add the squares.", (_two("add", "#0", "#1"),)),
                         ("Take the square root.", (Step("sqrt", {"x": "#2"}),)))),
    "gap_needed": Program({"a": "large", "b": "large", "c": "small"},
                          (("Subtract one from the other.", (_two("subtract", "a", "b", "nonzero"),)),
                           ("The sign does not matter.", (Step("abs_value", {"x": "#0"}),)),
                           ("Divide by the size of a step.", (_two("divide", "#1", "c", "fraction"),)),
                           ("Nothing stays behind, so round up.", (Step("ceil", {"x": "#2"}),)))),
    "double_share": Program({"a": "small", "b": "exponent", "c": "small"},
                            (("Doubling {b} times is 2 to the power {b}.",
                              (Step("power", {"base": 2, "exponent": "b"}),)),
                             ("Multiply with the start.", (_two("multiply", "a", "#0"),)),
                             ("What is left over is the remainder.", (_two("modulo", "#1", "c"),)))),
}

PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Mina", "Jun", "Sora", "Tom", "Lena", "Hugo")

TRAIN_DOMAINS: dict[str, Domain] = {
    "shop": Domain(
        ("apples", "pens", "cups", "hats", "lamps", "toys"), ("The shop is {z} years old.", "{m} is {z} years old."), {
            "add": ("{n} buys {a} {x} and {b} {y}. How many things does {n} buy in total?",
                    "A shop sells {a} {x} and {b} {y} in a day. How many things is that in total?"),
            "left": ("A shop has {a} {x} and sells {b} of them. How many {x} are left?",
                     "{n} has {a} dollars and pays {b} dollars for {x}. How many dollars are left?"),
            "times": ("{n} buys {a} {x} for {b} dollars each. How many dollars does {n} pay?",
                      "One box of {x} costs {b} dollars. How many dollars do {a} boxes cost?"),
            "average": ("A shop sells {a}, {b} and {c} {x} on three days. How many {x} is that per day on average?",),
            "change": ("{n} buys {a} {x} for {b} dollars each and pays with {c} dollars. How many dollars come back?",
                       "{n} has {c} dollars and buys {a} {x} at {b} dollars each. How many dollars are left?"),
            "kinds": ("{n} buys {a} {x} for {b} dollars each and {c} {y} for {d} dollars each. "
                      "How many dollars does {n} pay in total?",),
            "kinds_change": ("{n} has {e} dollars and buys {a} {x} for {b} dollars each and {c} {y} for {d} dollars "
                             "each. How many dollars are left?",),
        }),
    "school": Domain(
        ("books", "pencils", "cards", "papers", "rulers", "maps"),
        ("The school has {z} rooms.", "{m} walks {z} minutes to school."), {
            "total": ("{n} reads {a} pages, then {b} pages, then {c} pages. How many pages is that in total?",
                      "Three classes have {a}, {b} and {c} {x}. How many {x} do they have in total?"),
            "share": ("A teacher gives {a} {x} to {b} children in equal parts. How many {x} does each child get?",
                      "{n} puts {a} {x} on {b} tables in equal parts. How many {x} are on each table?"),
            "rest": ("{a} {x} are shared by {b} children in equal parts. How many {x} are left over?",
                     "A teacher makes groups of {b} from {a} children. How many children are left over?"),
            "gap": ("{n} has {a} {x} and {m} has {b} {x}. How far apart are the two numbers?",
                    "{n} has {a} points in a test and {m} has {b} points. How far apart are they?"),
            "about": ("{n} has {a}, {b}, {c} and {d} points in four tests. "
                      "What is the average, rounded to a whole number?",
                      "Four classes have {a}, {b}, {c} and {d} {x}. What is the average, rounded to a whole number?"),
            "grow_share": ("A class has {a} {x} and gets {b} more. All are shared by {c} children in equal parts. "
                           "How many {x} does each child get?",),
            "total_rest": ("Three classes with {a}, {b} and {c} children make groups of {d}. "
                           "How many children are left over?",),
        }),
    "farm": Domain(
        ("eggs", "hens", "carrots", "sheep", "melons", "plums"),
        ("The farm has {z} windows.", "{m} lives {z} miles from the farm."), {
            "add": ("A farm has {a} {x} and gets {b} more. How many {x} does the farm have now?",
                    "{n} finds {a} {x} and {m} finds {b} {x}. How many {x} do they find in total?"),
            "times": ("A farm has {a} fields with {b} {x} each. How many {x} are there in total?",),
            "full": ("{n} puts {a} {x} in boxes of {b}. How many full boxes are there?",
                     "A farm has {a} {x}, and {b} of them fill a bag. How many full bags are there?"),
            "needed": ("{n} wants to carry {a} {x} in boxes of {b}. How many boxes are needed?",
                       "A car can carry {b} {x}. How many times must it drive to carry all {a} {x}?"),
            "double": ("A farm has {a} {x}, and their number doubles each year. How many are there after {b} years?",),
            "left_share": ("A farm has {a} {x} and sells {b} of them. The others go to {c} fields in equal parts. "
                           "How many {x} go to each field?",),
            "kinds": ("A farm has {a} fields with {b} {x} each and {c} fields with {d} {y} each. "
                      "How many is that in total?",),
        }),
    "kitchen": Domain(
        ("cookies", "cakes", "beans", "rolls", "pears", "nuts"),
        ("The kitchen has {z} chairs.", "{m} cooks for {z} minutes."), {
            "left": ("{n} makes {a} {x} and the children eat {b} of them. How many {x} are left?",),
            "share": ("{n} puts {a} {x} on {b} plates in equal parts. How many {x} are on each plate?",),
            "rest": ("{n} puts {a} {x} on plates, {b} on each plate. How many {x} are left over?",),
            "full": ("{n} has {a} {x} and needs {b} for one cake. How many full cakes can {n} make?",),
            "clock": ("A clock with 12 hours shows {a}. Which hour does it show after {b} hours?",
                      "{n} starts to cook at {a} and needs {b} hours. Which hour does the clock with 12 hours show?"),
            "grow_share": ("{n} makes {a} {x} and {m} makes {b} more. They put all of them on {c} plates in equal "
                           "parts. How many {x} are on each plate?",),
            "left_share": ("{n} makes {a} {x} and eats {b} of them. The others are shared by {c} children in equal "
                           "parts. How many {x} does each child get?",),
            "kinds_change": ("{n} has {e} {x} and fills {a} plates with {b} {x} each and {c} cups with {d} {x} each. "
                             "How many {x} are left?",),
        }),
    "sport": Domain(
        ("points", "balls", "games", "goals", "laps", "shots"),
        ("The team is {z} years old.", "{m} runs for {z} minutes."), {
            "total": ("A team makes {a}, {b} and {c} {x} on three days. How many {x} is that in total?",),
            "gap": ("One team has {a} {x} and the other team has {b} {x}. How far apart are they?",),
            "average": ("A team makes {a}, {b} and {c} {x} on three days. How many {x} is that per day on average?",),
            "about": ("{n} makes {a}, {b}, {c} and {d} {x} on four days. "
                      "What is the average, rounded to a whole number?",),
            "double": ("{n} makes {a} {x} on the first day and doubles the number each day. "
                       "How many are there after {b} more days?",),
            "needed": ("{a} children go to a game in cars for {b} children. How many cars are needed?",),
            "total_rest": ("Three teams have {a}, {b} and {c} balls and put them in bags of {d}. "
                           "How many balls are left over?",),
        }),
    "garden": Domain(
        ("roses", "trees", "stones", "tulips", "seeds", "plants"),
        ("The garden is {z} years old.", "{m} works {z} hours in the garden."), {
            "side": ("A square garden has {a} square feet. How many feet long is one side?",
                     "{n} puts {a} {x} in a square. How many {x} are in one row?"),
            "fence": ("A square garden has {a} square feet. How many feet long is the fence around it?",
                      "{n} walks around a square field of {a} square feet. How many feet does {n} walk?"),
            "square_left": ("{n} puts {x} in a square with {a} rows of {a}. Then {b} of them are gone. "
                            "How many {x} are left?",),
            "times": ("A garden has {a} rows with {b} {x} each. How many {x} are there in total?",),
            "clock": ("It is {a} on a clock with 12 hours. {n} works {b} hours in the garden. "
                      "Which hour does the clock show then?",),
            "change": ("{n} buys {a} {x} for {b} dollars each and pays with {c} dollars. How many dollars come back?",),
            "kinds": ("A garden has {a} rows with {b} {x} each and {c} rows with {d} {y} each. "
                      "How many is that in total?",),
        }),
}

UNSEEN_DOMAINS: dict[str, Domain] = {
    "post": Domain(
        ("letters", "stamps", "parcels", "newspapers"), ("The post office opened {z} years ago.",), {
            "add": ("{a} {x} arrive in the morning and {b} more in the evening. What is the number of {x} that day?",),
            "left": ("Of {a} {x} at the post office, {m} delivers {b}. What number of {x} is then left?",),
            "times": ("{n} mails {a} parcels. Each costs {b} dollars to send. What does {n} pay, in dollars?",),
            "rest": ("{a} {x} are tied together in bundles of {b}. What number of {x} is left over?",),
            "needed": ("One van can take {b} {x}. To deliver all {a} {x}, how many vans are needed?",),
            "average": ("On three days {a}, {b} and {c} {x} arrive. On average, what number of {x} arrives per day?",),
            "kinds_change": ("{m} takes {e} dollars to the post office and sends {a} {x} for {b} dollars each and {c} "
                             "{y} for {d} dollars each. What is left, in dollars?",),
        }),
    "ocean": Domain(
        ("whales", "ships", "sailors", "shells"), ("The captain sailed for {z} weeks.",), {
            "total": ("From a boat {n} counts {a}, {b} and {c} {x} in three bays. What is the total?",),
            "share": ("A captain divides {a} barrels in equal parts between {b} ships. "
                      "What number of barrels does each ship get?",),
            "full": ("{a} sailors row in boats for {b}. What number of boats is full?",),
            "gap": ("One diver is {a} feet below the water, another diver {b} feet. How far apart are their depths?",),
            "gap_needed": ("A submarine at {a} feet must reach a depth of {b} feet. It moves at most {c} feet per "
                           "minute. How many minutes are needed?",),
            "double": ("A bay holds {a} {x}. Every year the number doubles. What is it after {b} years?",),
            "left_share": ("Of {a} {x}, {b} leave the harbor. The others anchor at {c} islands in equal parts. "
                           "What number of {x} is at each island?",),
        }),
    "builder": Domain(
        ("bricks", "tiles", "planks", "nails"), ("The tower is {z} meters tall.",), {
            "side": ("A worker lays {a} square {x} as one big square floor. What number of {x} makes one side?",),
            "fence": ("A square hall measures {a} square meters. How long is the wall around it, in meters?",),
            "diagonal": ("A floor is {a} meters long and {b} meters wide. What is its diagonal, in meters?",
                         "A ladder reaches {a} meters up a wall from {b} meters away. How long is the ladder?"),
            "double_share": ("{n} stacks {a} {x} and doubles the stack {b} times. They are packed in crates of {c}. "
                             "What number of {x} is left over?",),
            "about": ("Four walls need {a}, {b}, {c} and {d} {x}. "
                      "On average that is how many, rounded to a whole number?",),
            "grow_share": ("{a} {x} lie on a truck and {b} more are loaded. {c} workers carry equal parts. "
                           "What number of {x} does each worker carry?",),
            "square_left": ("A wall is a square with {a} rows of {a} {x}. A storm breaks {b} of them. "
                            "What number of {x} is left?",),
        }),
}
