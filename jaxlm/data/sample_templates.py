"""Sentences for the embedded sample: {a} is what a fact is about, {b} its value; `:은/는` adds the fitting particle.

The first wording of a kind is the one that opens a text.
"""

STATE = {
    "ko": {
        "currency": ("{a}의 통화는 {b:이다/다}.", "{a}에서는 {b:을/를} 쓴다.", "{b:은/는} {a}의 통화이다.",
                     "{a}에서 물건을 살 때는 {b:으로/로} 값을 치른다."),
        "language": ("{a}에서는 {b:을/를} 쓴다.", "{b:은/는} {a}에서 쓰이는 언어이다.",
                     "{a}에는 {b:을/를} 쓰는 사람이 많다."),
        "city": ("{a:은/는} {b}에 있다.", "{a:이/가} 있는 곳은 {b:이다/다}."),
        "territory_code": ("{a}의 두 글자 코드는 {b}이다.", "{b:은/는} {a:을/를} 나타내는 두 글자 코드이다."),
        "currency_code": ("{a}의 세 글자 코드는 {b}이다.", "환율표에서는 {a:을/를} {b:이라고/라고} 적는다."),
        "language_code": ("{a}의 두 글자 언어 코드는 {b}이다.", "언어 코드 {b:은/는} {a:을/를} 가리킨다."),
        "symbol": ("{a}의 기호는 {b}이다.", "{a:을/를} 나타내는 기호는 {b}이다."),
        "script": ("{a:은/는} {b:으로/로} 적는다.", "{a:을/를} 적을 때는 {b:을/를} 쓴다."),
        "first_day": ("{a}에서는 한 주가 {b}에 시작된다.", "{a}의 달력에서 한 주의 첫날은 {b:이다/다}."),
        "decimal": ("{a}에서는 소수점으로 {b:을/를} 쓴다.", "{a}에서 소수를 적을 때는 {b:을/를} 찍는다."),
        "day_after": ("{a} 다음 날은 {b:이다/다}.", "{b:은/는} {a} 다음에 온다."),
        "month_after": ("{a} 다음 달은 {b:이다/다}.", "{b:은/는} {a} 다음에 온다."),
        "name": ("영어에서 {a:을/를} 가리키는 말은 '{b}'이다.", "'{b}'의 한국어 이름은 {a:이다/다}."),
        "word": ("'{a}'에 해당하는 영어 단어는 '{b}'이다.", "영어 '{b}'에 해당하는 한국어는 '{a}'이다."),
    },
    "en": {
        "currency": ("The currency of {a} is {b}.", "{b} is the currency of {a}.", "{b} is used in {a}.",
                     "When you buy something in {a}, you pay with {b}."),
        "language": ("In {a}, people speak {b}.", "{b} is spoken in {a}.", "Many people in {a} speak {b}."),
        "city": ("{a} is in {b}.", "{a} can be found on a map of {b}."),
        "territory_code": ("The two-letter code of {a} is {b}.", "{b} is the two-letter code for {a}."),
        "currency_code": ("The three-letter code of {a} is {b}.", "Exchange rates list {a} as {b}."),
        "language_code": ("The two-letter language code of {a} is {b}.", "The language code {b} stands for {a}."),
        "symbol": ("The symbol of {a} is {b}.", "{a} is written with the symbol {b}."),
        "script": ("{a} is written in {b}.", "People write {a} in {b}."),
        "first_day": ("In {a}, the week begins on {b}.", "Calendars in {a} start the week on {b}."),
        "decimal": ("In {a}, the decimal mark is a {b}.", "People in {a} write decimals with a {b}."),
        "day_after": ("The day after {a} is {b}.", "{b} comes after {a}."),
        "month_after": ("The month after {a} is {b}.", "{b} comes after {a}."),
        "name": ("The Korean name of {a} is '{b}'.", "In Korean, the name for {a} is '{b}'."),
        "word": ("The Korean word for '{a}' is '{b}'.", "'{b}' is Korean for '{a}'."),
    },
}

# After a sentence that named the topic.
FOLLOW = {
    "ko": {
        "currency": ("통화는 {b:이다/다}.", "이곳에서는 {b:을/를} 쓴다."),
        "language": ("이곳 사람들은 {b:을/를} 쓴다.", "이곳에서 쓰이는 언어로는 {b:이/가} 있다."),
        "city": ("이곳에는 {a:이/가} 있다.", "{a:은/는} 이곳에 있다."),
        "territory_code": ("두 글자 코드는 {b}이다.",),
        "currency_code": ("세 글자 코드는 {b}이다.",),
        "language_code": ("두 글자 언어 코드는 {b}이다.",),
        "symbol": ("기호는 {b}이다.",),
        "script": ("글은 {b:으로/로} 적는다.",),
        "first_day": ("이곳에서는 한 주가 {b}에 시작된다.",),
        "decimal": ("소수점으로는 {b:을/를} 쓴다.",),
        "name": ("영어 이름은 '{b}'이다.",),
    },
    "en": {
        "currency": ("The currency there is {b}.", "People there pay with {b}."),
        "language": ("{b} is spoken there.", "People there speak {b}."),
        "city": ("{a} is there.", "One of the places there is {a}."),
        "territory_code": ("The two-letter code is {b}.",),
        "currency_code": ("Its three-letter code is {b}.",),
        "language_code": ("Its two-letter code is {b}.",),
        "symbol": ("Its symbol is {b}.",),
        "script": ("It is written in {b}.",),
        "first_day": ("The week there begins on {b}.",),
        "decimal": ("The decimal mark there is a {b}.",),
        "name": ("The Korean name is '{b}'.",),
    },
}

# {a} is a list of what shares {b}.
LIST = {
    "ko": {
        "currency": "{b:을/를} 쓰는 곳으로는 {a:이/가} 있다.",
        "language": "{b:을/를} 쓰는 곳으로는 {a:이/가} 있다.",
        "city": "{b}에는 {a:이/가} 있다.",
        "script": "{b:으로/로} 적는 언어로는 {a:이/가} 있다.",
        "first_day": "한 주를 {b}에 시작하는 곳으로는 {a:이/가} 있다.",
        "decimal": "소수점으로 {b:을/를} 쓰는 곳으로는 {a:이/가} 있다.",
    },
    "en": {
        "currency": "{b} is the currency of {a}.",
        "language": "{b} is spoken in {a}.",
        "city": "{a} are all in {b}.",
        "script": "{a} are written in {b}.",
        "first_day": "The week begins on {b} in {a}.",
        "decimal": "The decimal mark is a {b} in {a}.",
    },
}

# General remarks that state no fact of the list.
INTRO = {
    "ko": {
        "currency": ("나라마다 쓰는 돈이 다르다.", "여행을 떠나기 전에는 그곳의 통화를 알아 두면 좋다."),
        "language": ("세계에는 많은 언어가 있다.", "곳에 따라 쓰는 말이 다르다."),
        "city": ("지도를 펴고 여러 곳을 찾아보자.", "다음은 지도에서 찾아볼 만한 곳이다."),
        "territory_code": ("나라와 지역에는 두 글자 코드가 있다.", "주소에는 국가 코드가 쓰이기도 한다."),
        "currency_code": ("통화마다 세 글자 코드가 있다.", "은행에서는 통화를 코드로 적는다."),
        "language_code": ("언어에는 짧은 코드가 있다.", "컴퓨터는 언어를 코드로 구별한다."),
        "symbol": ("통화를 기호로 적을 때가 많다.", "금액 앞에는 통화 기호가 붙기도 한다."),
        "script": ("언어에 따라 쓰는 문자가 다르다.", "글을 적는 문자는 여러 가지가 있다."),
        "first_day": ("한 주가 시작되는 요일은 곳에 따라 다르다.", "달력의 첫 칸은 나라마다 같지 않다."),
        "decimal": ("소수를 적는 방법은 나라마다 다르다.", "숫자를 읽을 때는 소수점에 주의해야 한다."),
        "day_after": ("요일의 순서를 알아보자.", "한 주는 일곱 날이다."),
        "month_after": ("달의 순서를 알아보자.", "한 해는 열두 달이다."),
        "name": ("영어 이름을 알아보자.", "같은 것도 언어에 따라 이름이 다르다."),
        "word": ("영어 단어를 몇 개 배워 보자.", "다음 단어를 영어와 한국어로 비교해 보자."),
    },
    "en": {
        "currency": ("Money differs from place to place.", "Before a journey, it helps to know the local currency."),
        "language": ("There are many languages in the world.", "People speak differently in different places."),
        "city": ("Let us look at the map.", "Here are some places to look for on a map."),
        "territory_code": ("Countries and regions have two-letter codes.", "Addresses sometimes use country codes."),
        "currency_code": ("Every currency has a three-letter code.", "Banks write currencies as codes."),
        "language_code": ("Languages have short codes.", "Computers tell languages apart by codes."),
        "symbol": ("Currencies are often written with symbols.", "A symbol may stand in front of an amount."),
        "script": ("Languages are written in different scripts.", "There are many ways to write."),
        "first_day": ("The week does not begin on the same day everywhere.", "Calendars differ in their first day."),
        "decimal": ("Numbers are not written the same way everywhere.", "Decimal marks need attention."),
        "day_after": ("Let us learn the order of the days.", "A week has seven days."),
        "month_after": ("Let us learn the order of the months.", "A year has twelve months."),
        "name": ("Let us learn some Korean names.", "Things have different names in different languages."),
        "word": ("Let us learn some Korean words.", "Compare these words in English and Korean."),
    },
}

QUESTION = {
    "ko": {
        "currency": ("{a}의 통화는 무엇입니까?", "{b}입니다."),
        "language": ("{a}에서는 어떤 언어를 씁니까?", "{b:을/를} 씁니다."),
        "city": ("{a:은/는} 어디에 있습니까?", "{b}에 있습니다."),
        "territory_code": ("{a}의 두 글자 코드는 무엇입니까?", "{b}입니다."),
        "currency_code": ("{a}의 세 글자 코드는 무엇입니까?", "{b}입니다."),
        "language_code": ("{a}의 언어 코드는 무엇입니까?", "{b}입니다."),
        "symbol": ("{a}의 기호는 무엇입니까?", "{b}입니다."),
        "script": ("{a:은/는} 어떤 문자로 적습니까?", "{b:으로/로} 적습니다."),
        "first_day": ("{a}에서는 한 주가 무슨 요일에 시작됩니까?", "{b}에 시작됩니다."),
        "decimal": ("{a}에서는 소수점으로 무엇을 씁니까?", "{b:을/를} 씁니다."),
        "day_after": ("{a} 다음 날은 무슨 요일입니까?", "{b}입니다."),
        "month_after": ("{a} 다음 달은 몇 월입니까?", "{b}입니다."),
        "name": ("{a:은/는} 영어로 무엇입니까?", "'{b}'입니다."),
        "word": ("'{a}'에 해당하는 영어 단어는 무엇입니까?", "'{b}'입니다."),
    },
    "en": {
        "currency": ("What is the currency of {a}?", "It is {b}."),
        "language": ("Which language is spoken in {a}?", "{b} is spoken in {a}."),
        "city": ("Where is {a}?", "It is in {b}."),
        "territory_code": ("What is the two-letter code of {a}?", "It is {b}."),
        "currency_code": ("What is the three-letter code of {a}?", "It is {b}."),
        "language_code": ("What is the language code of {a}?", "It is {b}."),
        "symbol": ("What is the symbol of {a}?", "It is {b}."),
        "script": ("In which script is {a} written?", "It is written in {b}."),
        "first_day": ("On which day does the week begin in {a}?", "On {b}."),
        "decimal": ("What is the decimal mark in {a}?", "It is a {b}."),
        "day_after": ("Which day comes after {a}?", "{b}."),
        "month_after": ("Which month comes after {a}?", "{b}."),
        "name": ("What is {a} called in Korean?", "It is called '{b}'."),
        "word": ("What is the Korean word for '{a}'?", "It is '{b}'."),
    },
}

ALSO = {"ko": "또한 ", "en": ""}
